"""How the tasks of a step follow each other, and what they hold of memory: as Harmony counts, and as our lanes allow."""
