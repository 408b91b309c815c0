//! A delivered batch as Python objects: no copy is made, and the memory goes back when the last view of it dies.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use forebay::tokens::Dtype;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// A batch handed to Python.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Batch {
    inner: Arc<forebay::Batch>,
}

impl Batch {
    pub(crate) fn new(inner: Arc<forebay::Batch>) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl Batch {
    #[getter]
    fn epoch(&self) -> u64 {
        self.inner.epoch
    }

    #[getter]
    fn step(&self) -> u64 {
        self.inner.step
    }

    #[getter]
    fn rows(&self) -> usize {
        self.inner.rows
    }

    #[getter]
    fn address(&self) -> usize {
        self.inner.as_ptr() as usize
    }

    fn fields(&self) -> Vec<(&'static str, Array)> {
        self.inner.fields.iter().map(|field| (field.name, Array::new(&self.inner, *field))).collect()
    }

    /// Name, type, offset in bytes, shape and stride in values of each array, for those who gave the buffer.
    fn layout(&self) -> Vec<(&'static str, &'static str, usize, Vec<usize>, usize)> {
        let fields = self.inner.fields.iter();
        fields.map(|f| (f.name, f.dtype.name(), f.offset_bytes, f.shape[..f.ndim].to_vec(), f.row_stride)).collect()
    }
}

/// One array of a batch, by the buffer protocol and by DLPack.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Array {
    batch: Arc<forebay::Batch>,
    field: forebay::loader::Field,
    // Buffer views point at these two, and hold the object that they are in.
    shape: [ffi::Py_ssize_t; 2],
    strides_bytes: [ffi::Py_ssize_t; 2],
}

impl Array {
    fn new(batch: &Arc<forebay::Batch>, field: forebay::loader::Field) -> Self {
        let size = field.dtype.size();
        Self {
            batch: Arc::clone(batch),
            field,
            shape: field.shape.map(|count| count as ffi::Py_ssize_t),
            strides_bytes: [(field.row_stride * size) as ffi::Py_ssize_t, size as ffi::Py_ssize_t],
        }
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: the loader lays every field inside its batch's buffer, which lives as long as `self.batch`.
        unsafe { self.batch.as_ptr().add(self.field.offset_bytes) }
    }

    fn is_row_contiguous(&self) -> bool {
        self.field.shape[0] <= 1 || self.field.row_stride == self.field.shape[1]
    }

    fn is_column_contiguous(&self) -> bool {
        self.field.shape[0] <= 1 && self.is_row_contiguous() || self.field.shape[1] <= 1 && self.field.row_stride == 1
    }
}

/// The format of the `struct` module that NumPy reads as its own type of that width.
fn format_of(dtype: Dtype) -> &'static CStr {
    match dtype {
        Dtype::U8 => c"B",
        Dtype::U16 => c"H",
        Dtype::U32 => c"I",
        Dtype::I32 => c"i",
        Dtype::I64 if size_of::<std::ffi::c_long>() == 8 => c"l",
        Dtype::I64 => c"q",
    }
}

#[pymethods]
impl Array {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.field.shape[..self.field.ndim])
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.field.dtype.name()
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view was given to fill"));
        }
        let array = slf.get();
        let asks = |flag: c_int| flags & flag == flag;
        let refused = (asks(ffi::PyBUF_C_CONTIGUOUS) && !array.is_row_contiguous())
            || (asks(ffi::PyBUF_F_CONTIGUOUS) && !array.is_column_contiguous())
            || (asks(ffi::PyBUF_ANY_CONTIGUOUS) && !array.is_row_contiguous() && !array.is_column_contiguous())
            || (!asks(ffi::PyBUF_STRIDES) && !array.is_row_contiguous());
        if refused {
            return Err(PyBufferError::new_err(
                "this array's rows lie apart in memory: ask for strides, or copy it first",
            ));
        }
        let size = array.field.dtype.size();
        // SAFETY: `view` is valid and ours to fill (buffer protocol); shape, strides and memory live in, or as long as, the object
        // that `obj` keeps; the format is static.
        unsafe {
            (*view).buf = array.start().cast::<c_void>();
            (*view).len = (array.field.shape[0] * array.field.shape[1] * size) as ffi::Py_ssize_t;
            (*view).itemsize = size as ffi::Py_ssize_t;
            (*view).readonly = 0;
            (*view).ndim = array.field.ndim as c_int;
            (*view).format = if asks(ffi::PyBUF_FORMAT) {
                format_of(array.field.dtype).as_ptr().cast_mut()
            } else {
                ptr::null_mut()
            };
            (*view).shape = if asks(ffi::PyBUF_ND) { array.shape.as_ptr().cast_mut() } else { ptr::null_mut() };
            (*view).strides =
                if asks(ffi::PyBUF_STRIDES) { array.strides_bytes.as_ptr().cast_mut() } else { ptr::null_mut() };
            (*view).suboffsets = ptr::null_mut();
            (*view).internal = ptr::null_mut();
            (*view).obj = slf.into_any().into_ptr();
        }
        Ok(())
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(c_int, c_int)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // The format without a version is understood by every consumer, whatever it can do at most.
        let _ = max_version;
        if stream.is_some() {
            return Err(PyBufferError::new_err("`stream` must be None: the array is in host memory"));
        }
        if dl_device.is_some_and(|device| device != DEVICE) {
            return Err(PyBufferError::new_err(
                "the array is in host memory and does not go to another device by itself",
            ));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err("no copy is made here: take the array and copy it"));
        }
        dlpack::capsule(py, self)
    }

    fn __dlpack_device__(&self) -> (c_int, c_int) {
        DEVICE
    }
}

/// Host memory, in DLPack's numbers.
const DEVICE: (c_int, c_int) = (1, 0);

/// DLPack's C structures, version 0, and their capsule.
mod dlpack {
    use super::*;

    const NAME: &CStr = c"dltensor";

    #[repr(C)]
    struct Device {
        kind: c_int,
        id: c_int,
    }

    #[repr(C)]
    struct DataType {
        code: u8,
        bits: u8,
        lanes: u16,
    }

    #[repr(C)]
    struct Tensor {
        data: *mut c_void,
        device: Device,
        ndim: c_int,
        dtype: DataType,
        shape: *mut i64,
        strides: *mut i64,
        byte_offset: u64,
    }

    #[repr(C)]
    struct ManagedTensor {
        tensor: Tensor,
        context: *mut c_void,
        deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    }

    /// A tensor and what its pointers reach.
    struct Export {
        managed: ManagedTensor,
        shape: [i64; 2],
        strides: [i64; 2],
        _batch: Arc<forebay::Batch>,
    }

    pub(super) fn capsule<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyAny>> {
        let code = match array.field.dtype {
            Dtype::I32 | Dtype::I64 => 0,
            Dtype::U8 | Dtype::U16 | Dtype::U32 => 1,
        };
        let dtype = DataType { code, bits: (array.field.dtype.size() * 8) as u8, lanes: 1 };
        let tensor = Tensor {
            data: array.start().cast(),
            device: Device { kind: DEVICE.0, id: DEVICE.1 },
            ndim: array.field.ndim as c_int,
            dtype,
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        };
        let export = Box::into_raw(Box::new(Export {
            managed: ManagedTensor { tensor, context: ptr::null_mut(), deleter: Some(release) },
            shape: array.field.shape.map(|count| count as i64),
            strides: [array.field.row_stride as i64, 1],
            _batch: Arc::clone(&array.batch),
        }));
        // SAFETY: `export` was just made and is reached by nobody else; the pointers stored in it go to its own fields, which stay where
        // they are until `release` frees it.
        unsafe {
            (*export).managed.tensor.shape = (&raw mut (*export).shape).cast();
            (*export).managed.tensor.strides = (&raw mut (*export).strides).cast();
            (*export).managed.context = export.cast();
            let made = ffi::PyCapsule_New((&raw mut (*export).managed).cast(), NAME.as_ptr(), Some(forget_unused));
            if made.is_null() {
                drop(Box::from_raw(export));
            }
            Bound::from_owned_ptr_or_err(py, made)
        }
    }

    /// Called once by the consumer, on any thread, attached or not.
    unsafe extern "C" fn release(managed: *mut ManagedTensor) {
        // SAFETY: `context` is the box made by `capsule`, and the consumer calls this once (DLPack).
        drop(unsafe { Box::from_raw((*managed).context.cast::<Export>()) });
    }

    /// The capsule's destructor: a consumer renames a capsule when it takes the tensor over.
    unsafe extern "C" fn forget_unused(capsule: *mut ffi::PyObject) {
        // SAFETY: called by the interpreter, attached, with the capsule made above; its pointer is valid as long as the name is ours.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr().cast::<c_char>()) == 1 {
                let managed = ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr().cast::<c_char>());
                release(managed.cast());
            }
        }
    }
}
