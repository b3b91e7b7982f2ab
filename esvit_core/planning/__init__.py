"""What a training will take before it starts: memory, images a second, days, money."""
