"""What works over many models, and the demo."""
