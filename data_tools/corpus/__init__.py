"""A corpus folder from outside training: writing, checking, mending and asking it."""
