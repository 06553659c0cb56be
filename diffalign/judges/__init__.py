"""Judges that answer in words: backends, questions and the reading of replies. `find_judge` opens them all."""
