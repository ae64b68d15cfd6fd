"""The parts of a registry scan; :mod:`pipelines.scan_registry` puts them together."""
