"""What a run is and how it stands, in words: for tags, for the note on its page, for whoever reads it later."""
