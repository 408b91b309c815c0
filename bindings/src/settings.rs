//! Converts Python objects to typed values and back. The core resolves and checks them.

use forebay::settings::environment::Environment;
use forebay::settings::{
    self, Config, Framework, MeshDimension, ProcessGroup, Resolved, Sampler, Scope, Setting, Value,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString};

use crate::error::detached;

/// Deepest nesting of lists and dicts in a value. A mixture needs five levels.
const MOST_LEVELS: usize = 16;

/// The settings of a loader, resolved once. A loader is opened from it.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Settings {
    pub(crate) resolved: Resolved,
    given: Vec<(String, Value)>,
    from_env: bool,
}

/// The facts that torch states beside the settings, by the names that torch's own loader has for
/// them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Torch {
    drop_last: bool,
    num_workers: u64,
    prefetch_factor: Option<u64>,
    generator_seed: Option<u64>,
    /// Rank, number of ranks, seed, and whether the last samples are dropped.
    sampler: Option<(u64, u64, u64, bool)>,
    /// Name, rank and size of each dimension.
    mesh: Option<Vec<(Option<String>, u64, u64)>>,
    /// Rank and size of the group of torch.distributed.
    process_group: Option<(u64, u64)>,
}

impl From<Torch> for Framework {
    fn from(torch: Torch) -> Self {
        let sampler = |(rank, size, seed, drop_last)| Sampler { rank, size, seed, drop_last };
        let dimension = |(name, rank, size)| MeshDimension { name, rank, size };
        let group = |(rank, size)| ProcessGroup { name: "torch.distributed", rank, size };
        Self {
            drop_last: torch.drop_last,
            num_workers: torch.num_workers,
            prefetch_factor: torch.prefetch_factor,
            generator_seed: torch.generator_seed,
            sampler: torch.sampler.map(sampler),
            mesh: torch.mesh.map(|dimensions| dimensions.into_iter().map(dimension).collect()),
            process_group: torch.process_group.map(group),
        }
    }
}

#[pymethods]
impl Settings {
    /// Resolves the settings `given` by name. `None` is not given.
    #[new]
    #[pyo3(signature = (given, from_env=false, torch=None))]
    fn new(py: Python<'_>, given: &Bound<'_, PyDict>, from_env: bool, torch: Option<Torch>) -> PyResult<Self> {
        let given = typed_values(given)?;
        let scope = if from_env { Scope::All } else { Scope::OperationalOnly };
        let framework = torch.map(Framework::from);
        let resolved = detached(py, || match &framework {
            Some(framework) => settings::resolve_within(&given, &Environment::current(), scope, framework),
            None => settings::resolve(&given, &Environment::current(), scope),
        })?;
        Ok(Self { resolved, given, from_env })
    }

    /// Every setting in force, by name.
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        values(py, &self.resolved.config)
    }

    /// The origin of each setting, by name.
    fn origins<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for origin in &self.resolved.origins {
            dict.set_item(origin.name, &origin.origin)?;
        }
        Ok(dict)
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.resolved.warnings.clone()
    }

    #[getter]
    fn notes(&self) -> Vec<String> {
        self.resolved.notes.clone()
    }

    /// The settings that give the same loader in a process without torch, and whether the
    /// environment may give others.
    fn arguments<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyDict>, bool)> {
        let dict = objects(py, &self.given)?;
        for name in &self.resolved.implied {
            let setting = settings::find(name).expect("the core implies settings");
            dict.set_item(name, object_of(py, &setting.value(&self.resolved.config))?)?;
        }
        Ok((dict, self.from_env))
    }
}

/// Checks the types of the settings `given` by name, and leaves out settings that are `None`.
///
/// The values become Python's own types, which can be pickled.
#[pyfunction]
pub(crate) fn typed<'py>(py: Python<'py>, given: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyDict>> {
    objects(py, &typed_values(given)?)
}

fn typed_values(given: &Bound<'_, PyDict>) -> PyResult<Vec<(String, Value)>> {
    let mut values = Vec::with_capacity(given.len());
    for (name, object) in given {
        if object.is_none() {
            continue;
        }
        let name: String = name.extract()?;
        let Some(setting) = settings::find(&name) else {
            let near = settings::nearest(&name).map_or_else(String::new, |near| format!(": did you mean `{near}`?"));
            return Err(PyTypeError::new_err(format!("unknown setting `{name}`{near}")));
        };
        let value = if setting.takes_paths() {
            paths_of(&name, &object, setting)?
        } else {
            value_of(&object, Some(setting), 0)?
        };
        setting.check_type(&value).map_err(PyTypeError::new_err)?;
        values.push((name, value));
    }
    Ok(values)
}

/// The paths in `object`, which is one path or several.
fn paths_of(name: &str, object: &Bound<'_, PyAny>, setting: &Setting) -> PyResult<Value> {
    let refused = |object: &Bound<'_, PyAny>| {
        let kind = object.get_type().name()?;
        Err(PyTypeError::new_err(format!(
            "`{name}` must be a path or several, found {kind}; save a Hugging Face dataset with \
             `save_to_disk(folder)`, and give that folder"
        )))
    };
    // A dataset looks like a list of its rows, which may be large.
    if object.hasattr("column_names")? || object.cast::<PyMapping>().is_ok() {
        return refused(object);
    }
    let is_path = |object: &Bound<'_, PyAny>| -> PyResult<bool> {
        Ok(object.cast::<PyString>().is_ok() || object.hasattr("__fspath__")?)
    };
    if is_path(object)? {
        return Ok(Value::List(vec![value_of(object, Some(setting), 0)?]));
    }
    let Ok(paths) = object.try_iter() else { return refused(object) };
    let mut values = Vec::new();
    for path in paths {
        let path = path?;
        if !is_path(&path)? {
            return refused(&path);
        }
        values.push(value_of(&path, Some(setting), 1)?);
    }
    Ok(Value::List(values))
}

fn objects<'py>(py: Python<'py>, values: &[(String, Value)]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in values {
        dict.set_item(name, object_of(py, value)?)?;
    }
    Ok(dict)
}

/// Every setting of `config` as a Python value.
pub(crate) fn values<'py>(py: Python<'py>, config: &Config) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for setting in settings::all() {
        dict.set_item(setting.name, object_of(py, &setting.value(config))?)?;
    }
    Ok(dict)
}

/// Makes the Python object of a value. A list inside a list becomes a tuple, as users write ranges.
fn object_of<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::None => py.None().into_bound(py),
        Value::Switch(on) => PyBool::new(py, *on).to_owned().into_any(),
        Value::Integer(number) => number.into_pyobject(py)?.into_any(),
        Value::Float(number) => PyFloat::new(py, *number).into_any(),
        Value::Text(text) => PyString::new(py, text).into_any(),
        Value::List(values) => {
            let list = PyList::empty(py);
            for value in values {
                let object = object_of(py, value)?;
                match object.cast::<PyList>() {
                    Ok(inner) => list.append(inner.to_tuple())?,
                    Err(_) => list.append(object)?,
                }
            }
            list.into_any()
        }
        Value::Map(entries) => objects(py, entries)?.into_any(),
        Value::Other(name) => return Err(PyTypeError::new_err(format!("a setting cannot be a {name}"))),
    })
}

/// Makes the typed value of a Python object for `setting`.
///
/// Numbers of NumPy and other libraries count as numbers, paths as text, and every other iterable
/// as a list.
fn value_of(object: &Bound<'_, PyAny>, setting: Option<&Setting>, level: usize) -> PyResult<Value> {
    if object.is_none() {
        return Ok(Value::None);
    }
    if let Ok(text) = object.cast::<PyString>() {
        return Ok(Value::Text(text.to_str()?.to_owned()));
    }
    if let Ok(on) = object.cast::<PyBool>() {
        return Ok(Value::Switch(on.is_true()));
    }
    if let Ok(number) = object.cast::<PyInt>() {
        return Ok(integer_of(number));
    }
    if level == 0 && setting.is_some_and(Setting::takes_dtype) {
        return dtype_name(object);
    }
    let kind = object.get_type().name()?.to_string();
    if level == MOST_LEVELS {
        return Ok(Value::Other(kind));
    }
    if object.hasattr("__fspath__")? {
        let path = object.py().import("os")?.call_method1("fspath", (object,))?;
        return value_of(&path, setting, MOST_LEVELS);
    }
    // NumPy's booleans are not Python's booleans, and not numbers.
    if matches!(kind.as_str(), "bool" | "bool_") {
        return Ok(Value::Switch(object.is_truthy()?));
    }
    if let Ok(number) = object.py().import("operator")?.call_method1("index", (object,)) {
        return Ok(integer_of(number.cast::<PyInt>()?));
    }
    if let Ok(mapping) = object.cast::<PyMapping>() {
        let mut entries = Vec::with_capacity(mapping.len()?);
        for item in mapping.items()?.iter() {
            let (key, value): (String, Bound<'_, PyAny>) = item.extract()?;
            entries.push((key, value_of(&value, setting, level + 1)?));
        }
        return Ok(Value::Map(entries));
    }
    if object.hasattr("__float__")? && !object.hasattr("__len__")? {
        return Ok(object.extract().map_or(Value::Other(kind), Value::Float));
    }
    match object.try_iter() {
        Ok(values) => {
            let values = values.map(|value| value_of(&value?, setting, level + 1));
            Ok(Value::List(values.collect::<PyResult<_>>()?))
        }
        Err(_) => Ok(Value::Other(kind)),
    }
}

/// Reads an integer. A number that exceeds every setting stays text, so that an error can show it.
fn integer_of(number: &Bound<'_, PyInt>) -> Value {
    number.extract().map_or_else(|_| Value::Text(number.to_string()), Value::Integer)
}

/// The name of a dtype of NumPy or torch, or of an object that NumPy turns into a dtype.
fn dtype_name(object: &Bound<'_, PyAny>) -> PyResult<Value> {
    let text = object.str()?.to_string();
    if let Some(name) = text.strip_prefix("torch.") {
        return Ok(name.into());
    }
    match object.py().import("numpy")?.call_method1("dtype", (object,)) {
        Ok(dtype) => Ok(Value::Text(dtype.getattr("name")?.extract()?)),
        Err(_) => Ok(Value::Other(object.get_type().name()?.to_string())),
    }
}
