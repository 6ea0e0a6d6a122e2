"""What other systems call our tensors, and the files they read and write."""
