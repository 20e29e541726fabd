"""Pictures of placements, searches, regions, pruning and reconstructions (extra `viz`)."""
