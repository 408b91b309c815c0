//! Blocking client of object stores.
