//! Serves batches to other processes, and takes them.
