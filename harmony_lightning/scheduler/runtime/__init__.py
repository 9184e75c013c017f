"""The runtime's rules: tasks, slots and memory of a step as the engine carries a plan out."""
