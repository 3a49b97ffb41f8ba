"""Everything in one go: clips or features in, a trained model, its scores and a page out."""
