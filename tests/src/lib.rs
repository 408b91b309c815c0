//! Corpora for the tests.
