"""What a training will take before it starts: memory, pictures a second, days, money."""
