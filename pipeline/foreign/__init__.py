"""Models that were made elsewhere: found as files on any URL, read without running anything in them, built, checked."""
