"""The rules that join settings, sections and the world size, by what they are about; each is a function `rule_*`."""
