"""Training in a Kubernetes job of several pods: its objects, and the step that creates and follows it."""
