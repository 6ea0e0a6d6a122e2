"""Ranks as processes: agents that start and watch them, and the lead that decides for all."""
