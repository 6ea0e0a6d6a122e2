"""What a build counts and says: statistics, progress, the report of a corpus."""
