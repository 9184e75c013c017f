"""The observability room: what a run did, for people and programs to read. No torch in here."""
