"""What happens to texts before they are tokenised: cleaning, duplicates, decontamination; functions of arrays."""
