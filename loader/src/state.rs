//! Saved positions.

/// A position in the global order and what it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {}
