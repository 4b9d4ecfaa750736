"""Recordings in VPT format: read, checked, split, downloaded, decoded into clips and shards, loaded."""
