"""Models that tests of engines load: networks, and the files that engines take."""
