"""What ``test_sandbox.py`` runs in the child process. Standard library only."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    match sys.argv[1]:
        case "environment":
            Path("environment.json").write_text(json.dumps(dict(os.environ)))
        case "interfaces":
            Path("interfaces.json").write_text(json.dumps([name for _, name in socket.if_nameindex()]))
        case "fail":
            raise ValueError("the reason")
        case "hang":
            grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path("grandchild").write_text(str(grandchild.pid))
            time.sleep(600)
        case "memory":
            bytearray(1024**3)
