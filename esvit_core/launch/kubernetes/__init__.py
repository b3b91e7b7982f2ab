"""Training in a job of several pods: what is created, and how the step that launches it follows it."""
