//! Storage: the bytes of files, wherever they lie.

pub mod local;
