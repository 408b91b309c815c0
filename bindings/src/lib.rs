//! Python bindings: `forebay._core`. They convert and hand over; every decision is the core's.

mod batch;
mod error;
mod loader;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::batch::{Array, Batch};
    #[pymodule_export]
    use crate::loader::{Batches, Loader, resolve};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
