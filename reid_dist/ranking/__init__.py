"""The evaluator's inner parts: features, tiles of products, counts, positions, neighbours, re-ranking."""
