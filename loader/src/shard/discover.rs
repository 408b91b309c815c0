//! Finds the shards that paths, folders and patterns mean.
