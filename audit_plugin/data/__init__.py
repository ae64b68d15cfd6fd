"""The clean images: reading them, judging them, splitting them. Imports no torch and no mlflow."""
