"""``python -m audit_plugin.cli``."""

from audit_plugin.cli import main

main()
