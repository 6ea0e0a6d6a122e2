"""`gptdist data`: corpora built, shown, verified, and their order."""
