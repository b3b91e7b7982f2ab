"""Features of new pictures by a published backbone, streamed to a file: views, and regions where asked for."""
