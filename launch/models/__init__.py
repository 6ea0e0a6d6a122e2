"""What is done with a trained model: evaluate, generate, serve, export; and import of others."""
