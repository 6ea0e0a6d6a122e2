"""Offline tools for corpora: text -> token shards, and looking at what was built."""
