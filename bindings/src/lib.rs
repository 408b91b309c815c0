//! Python bindings: `forebay._core`. They convert and hand over. The core makes every decision.

mod batch;
mod error;
mod loader;
mod notices;
mod pass;
mod settings;

use std::ffi::OsString;
use std::io::Write;

use forebay::settings::environment::Environment;
use pyo3::prelude::*;

/// Runs the command line and returns its exit status. `arguments` begin with the program's name.
#[pyfunction]
fn run_command(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<u8> {
    // The command runs outside of the interpreter, which would notice Ctrl-C only at its end.
    let _interrupt = forebay_cli::end_at_interrupt();
    error::detached(py, || {
        let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
        let status = forebay_cli::run(&arguments, &Environment::current(), &mut out, &mut err);
        // Python's exit does not flush Rust's streams. An error means that the reader has gone.
        let _ = out.flush();
        Ok(status)
    })
}

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::batch::{Array, Batch, Tensors};
    #[pymodule_export]
    use crate::loader::{Loader, verdict_of_dataset};
    #[pymodule_export]
    use crate::pass::{Batches, Parts, SharedLoader};
    #[pymodule_export]
    use crate::settings::{Settings, typed};
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::run_command;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // SAFETY: an attached thread has an interpreter, and attached threads make modules.
        let interpreter = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
        if interpreter != 0 {
            return Err(pyo3::exceptions::PyImportError::new_err(format!(
                "forebay cannot be imported in sub-interpreter {interpreter}: its threads and its memory belong to one \
                 interpreter; import it in the main interpreter, or start a process"
            )));
        }
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
