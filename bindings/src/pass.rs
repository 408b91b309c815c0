//! Passes in Python, of a whole loader or of one consumer.
//!
//! Each method converts, detaches, makes one call, and converts the result.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay::batch_source::split::{NextPart, PartPass, Split, SplitOptions};
use forebay::batch_source::{BatchPass, BatchSource};
use forebay::loader::{MAX_EPOCH, WaitPolicy};
use forebay::{Error, Next};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyTimeoutError};
use pyo3::marker::Ungil;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::batch::{Batch, Tensors, add_facts, max_seqlen};
use crate::error::{detached, to_python};
use crate::loader::{counted, state_pairs};
use crate::notices;

/// Longest wait between two checks for pending signals.
pub(crate) const SLICE: Duration = Duration::from_millis(50);

/// Waits detached, in slices, and checks signals between them.
///
/// Returns `None` if `wait` gives nothing before the time is over. A caller with a limit only
/// waits, because a batch that it computes itself may take longer.
fn in_slices<T: Send>(
    py: Python<'_>,
    timeout_seconds: Option<f64>,
    wait: impl Fn(WaitPolicy) -> forebay::Result<Option<T>> + Ungil + Send + Sync,
) -> PyResult<Option<T>> {
    // A time beyond the range of the clock is no limit.
    let limit = timeout_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let policy = match left {
            Some(left) => WaitPolicy::Wait(left.min(SLICE)),
            None => WaitPolicy::Help(SLICE),
        };
        let found = detached(py, || wait(policy))?;
        if found.is_some() {
            tell_with_a_batch(py);
            return Ok(found);
        }
        notices::tell(py)?;
        py.check_signals()?;
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(None);
        }
    }
}

/// Tells the notices while this thread holds a batch. No error may lose the batch.
///
/// Telling runs Python: handlers of the log, and the interpreter's check for signals. An interrupt
/// that is raised there is raised again as soon as the batch is handed over. Another error of a
/// handler goes to Python's hook for errors that cannot be raised.
fn tell_with_a_batch(py: Python<'_>) {
    let Err(error) = notices::tell(py) else { return };
    if error.is_instance_of::<PyKeyboardInterrupt>(py) {
        // SAFETY: this thread is attached to the interpreter. The call only notes a signal.
        unsafe { pyo3::ffi::PyErr_SetInterrupt() };
    } else {
        error.write_unraisable(py, None);
    }
}

/// A pass over one or several epochs. Several threads may ask it for batches at once.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Batches {
    inner: Option<Arc<dyn BatchPass>>,
    process: u32,
}

impl Batches {
    pub(crate) fn new(inner: Arc<dyn BatchPass>) -> Self {
        Self { inner: Some(inner), process: std::process::id() }
    }

    fn get(&self) -> &dyn BatchPass {
        self.inner.as_deref().expect("taken only when dropped")
    }

    fn take(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Option<Arc<forebay::Batch>>> {
        notices::tell(py)?;
        let batches = self.get();
        // A batch that is ready is taken while attached. Other threads could take long to give the
        // interpreter back.
        match batches.take(WaitPolicy::None).map_err(|error| to_python(py, &error))? {
            Next::Batch(batch) => return Ok(Some(batch)),
            Next::End => return Ok(None),
            Next::Pending => {}
        }
        let found = in_slices(py, timeout_seconds, |policy| {
            Ok(match batches.take(policy)? {
                Next::Batch(batch) => Some(Some(batch)),
                Next::End => Some(None),
                Next::Pending => None,
            })
        })?;
        found.ok_or_else(|| PyTimeoutError::new_err("no batch was ready in time"))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // In a forked child, a vanished thread may hold the locks that dropping takes.
        if std::process::id() != self.process {
            std::mem::forget(self.inner.take());
        }
    }
}

#[pymethods]
impl Batches {
    /// Returns the next batch, or None at the end of the pass.
    #[pyo3(signature = (timeout_seconds=None))]
    fn next(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Option<Batch>> {
        Ok(self.take(py, timeout_seconds)?.map(Batch::new))
    }

    /// Returns step and tensors of the next batch, or None at the end of the pass.
    #[pyo3(signature = (tensors, timeout_seconds=None))]
    fn next_tensors<'py>(
        &self,
        py: Python<'py>,
        tensors: &Tensors,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Option<(u64, Bound<'py, PyDict>)>> {
        let Some(batch) = self.take(py, timeout_seconds)? else { return Ok(None) };
        let dict = tensors.of(py, &batch, &batch.fields)?;
        add_facts(&dict, &batch, 0, max_seqlen(&batch))?;
        Ok(Some((batch.step, dict)))
    }

    /// Gives `nbytes` bytes at `ptr` to the next batch without memory. `owner` keeps them alive.
    fn submit(&self, py: Python<'_>, ptr: usize, nbytes: usize, owner: Py<PyAny>) -> PyResult<()> {
        let buffer = Submitted::new(py, ptr, nbytes, owner)?;
        detached(py, move || {
            let Submitted { start: Address(start), nbytes, owner } = { buffer };
            // SAFETY: see `Submitted`.
            unsafe { self.get().submit(start, nbytes, owner) }
        })
    }

    #[getter]
    fn batch_bytes(&self) -> usize {
        self.get().batch_bytes()
    }

    #[getter]
    fn buffers_wanted(&self) -> usize {
        self.get().buffers_wanted()
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() != self.process {
            return Ok(());
        }
        detached(py, || {
            self.get().close();
            Ok(())
        })
    }
}

/// A loader that several consumers share.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct SharedLoader {
    inner: Split,
}

impl SharedLoader {
    pub(crate) fn new(
        py: Python<'_>,
        source: Arc<dyn BatchSource>,
        count: u64,
        ahead: Option<u64>,
        external: bool,
    ) -> PyResult<Self> {
        let options = SplitOptions { count, ahead, external };
        let inner = Split::new(source, options).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner })
    }
}

#[pymethods]
impl SharedLoader {
    fn iter(&self, consumer: usize) -> Parts {
        Parts { inner: Some(self.inner.iter(consumer)), process: std::process::id(), consumer }
    }

    fn set_epoch(&self, py: Python<'_>, consumer: usize, epoch: &Bound<'_, PyAny>) -> PyResult<()> {
        self.inner.set_epoch(consumer, counted(py, "epoch", epoch, MAX_EPOCH)?);
        Ok(())
    }

    fn begins_pass(&self, consumer: usize) -> bool {
        self.inner.begins_pass(consumer)
    }

    fn close(&self, py: Python<'_>, consumer: usize) -> PyResult<()> {
        detached(py, || {
            self.inner.close(consumer);
            Ok(())
        })
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
        let state = detached(py, || Ok(self.inner.state()))?;
        state_pairs(py, &state)
    }

    fn restored(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || {
            self.inner.restored();
            Ok(())
        })
    }
}

/// A pass of one consumer of a shared loader.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Parts {
    inner: Option<PartPass>,
    process: u32,
    consumer: usize,
}

impl Parts {
    fn get(&self) -> &PartPass {
        self.inner.as_ref().expect("taken only when dropped")
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // In a forked child, a vanished thread may hold the locks that dropping takes.
        if std::process::id() != self.process {
            std::mem::forget(self.inner.take());
        }
    }
}

#[pymethods]
impl Parts {
    /// Returns the next rows of this consumer, or None at the end of the pass.
    #[pyo3(signature = (timeout_seconds=None))]
    fn next(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Option<Batch>> {
        let last = std::sync::Mutex::new(None);
        let found = in_slices(py, timeout_seconds, |policy| {
            Ok(match self.get().take(policy)? {
                NextPart::Pending => None,
                waiting @ NextPart::Waiting { .. } => {
                    *last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(waiting);
                    None
                }
                found => Some(found),
            })
        })?;
        match found {
            Some(NextPart::Part(part)) => Ok(Some(Batch::part(part))),
            Some(NextPart::OtherEpoch { told, epoch }) => Err(PyRuntimeError::new_err(format!(
                "consumer {} was told epoch {told}, but the others are in their pass of epoch {epoch}: tell all of them \
                 the same",
                self.consumer
            ))),
            Some(_) => Ok(None),
            None => Err(PyTimeoutError::new_err(match last.into_inner() {
                Ok(Some(NextPart::Waiting { consumer, behind })) => {
                    format!("consumer {consumer} is {behind} batches behind consumer {}", self.consumer)
                }
                _ => "no batch was ready in time".to_owned(),
            })),
        }
    }

    /// Number of buffers to submit before the next batch is taken. 0 if the pass has not begun.
    fn buffers_missing(&self, py: Python<'_>) -> PyResult<usize> {
        detached(py, || Ok(self.get().begin()?.map_or(0, |pass| pass.buffers_missing())))
    }

    /// Smallest size of a submitted buffer, in bytes. 0 if the pass has not begun.
    fn batch_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        detached(py, || Ok(self.get().begin()?.map_or(0, |pass| pass.batch_bytes())))
    }

    /// Gives `nbytes` bytes at `ptr` to the next batch without memory. `owner` keeps them alive.
    fn submit(&self, py: Python<'_>, ptr: usize, nbytes: usize, owner: Py<PyAny>) -> PyResult<()> {
        let buffer = Submitted::new(py, ptr, nbytes, owner)?;
        detached(py, move || {
            let Submitted { start: Address(start), nbytes, owner } = { buffer };
            let Some(pass) = self.get().begin()? else { return Ok(()) };
            // SAFETY: see `Submitted`.
            unsafe { pass.submit(start, nbytes, owner) }
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() != self.process {
            return Ok(());
        }
        detached(py, || {
            self.get().close();
            Ok(())
        })
    }
}

/// A buffer that Python submits.
///
/// `_core` is private to the package. Its callers pass the address and size of a tensor, and the
/// tensor itself, and do not write to it. This crate writes every byte before it reads it.
struct Submitted {
    start: Address,
    nbytes: usize,
    owner: Box<dyn Any + Send + Sync>,
}

impl Submitted {
    fn new(py: Python<'_>, ptr: usize, nbytes: usize, owner: Py<PyAny>) -> PyResult<Self> {
        let start = NonNull::new(ptr as *mut u8).filter(|start| start.as_ptr().align_offset(8) == 0);
        let start = start.ok_or_else(|| {
            to_python(py, &Error::config(format!("a buffer must be aligned to 8 bytes, found address {ptr:#x}")))
        })?;
        Ok(Self { start: Address(start), nbytes, owner: Box::new(Owner(Some(owner))) })
    }
}

/// An address on its way through a detached section.
struct Address(NonNull<u8>);

// SAFETY: it is only an address. Each use says why the memory may be accessed.
unsafe impl Send for Address {}

/// A Python object that any thread may drop.
pub(crate) struct Owner(Option<Py<PyAny>>);

impl Owner {
    /// The object, until it is dropped.
    pub(crate) fn object(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.as_ref().map(|object| object.clone_ref(py))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let Some(object) = self.0.take() else { return };
        let mut object = Some(object);
        let attached = Python::try_attach(|py| {
            if let Some(object) = object.take() {
                drop(object.into_bound(py));
            }
        });
        if attached.is_none() {
            // The interpreter is shutting down and takes its memory with it.
            std::mem::forget(object);
        }
    }
}
