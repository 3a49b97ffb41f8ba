"""All steps in one command: from clips or features to a trained model, its scores and a report."""
