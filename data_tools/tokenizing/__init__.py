"""Tokenizers: made, converted, and run by the quickest library that gives the identical ids."""
