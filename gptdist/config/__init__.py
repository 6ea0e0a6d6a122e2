"""What a run is told: sections, units, reading YAML, and the rules that join settings."""
