"""From what the user names to documents: files, pieces of bounded size, and a reader for each format."""
