"""Pure functions of arrays; no model, file or device."""
