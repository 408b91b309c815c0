//! Layout: which tokens of the corpus make which sequence.

pub mod concat;
