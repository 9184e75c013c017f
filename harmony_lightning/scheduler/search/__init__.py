"""Searchers: of schedules by proof or by breeding, and of plans that the runtime can carry out now."""
