"""What MLflow loads through entry points; thin, no detection logic."""
