//! `forebay config`: prints the settings in force and the origin of each.

use forebay::Config;
use forebay::settings::{self, Resolved, Scope, Setting};
use serde_json::{Map, Value, json};

use crate::report::{escaped, exact_bytes, number_of};
use crate::{Context, Failure, MISUSED, Sets};

/// Largest width of a column. Longer values push the rest of their line to the right.
const WIDEST: usize = 32;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "`--help` describes every setting. Warnings and notes go to standard error.\n\n\
        Example: FOREBAY_SEQ_LEN=4096 forebay config --set batch_size=8",
    after_long_help = help()
)]
pub(crate) struct Options {
    /// Ends with status 2 if there is a warning, such as a mistyped variable
    #[arg(long)]
    strict: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let resolved = settings::resolve(&options.sets.sets, context.env, Scope::All)?;
    if options.json {
        writeln!(context.out, "{}", as_json(&resolved))?;
    } else {
        write_table(&resolved, context)?;
    }
    context.tell(&resolved)?;
    if options.strict && !resolved.warnings.is_empty() {
        let warnings = number_of(resolved.warnings.len() as u64, "warning");
        writeln!(context.err, "error: {warnings}, and `--strict` allows none")?;
        return Ok(MISUSED);
    }
    Ok(0)
}

/// The help of an option: the meaning of the setting `name`, and its accepted values.
pub(crate) fn help_of(name: &str) -> String {
    let setting = settings::find(name).expect("an option has the name of its setting");
    let doc = setting.doc().replace('`', "");
    format!("{doc} Accepts {}", setting.accepts().replace('`', ""))
}

/// Describes every setting.
fn help() -> String {
    let about = |setting: &Setting| {
        let (name, default) = (setting.name, setting.default_text());
        let default = if default.is_empty() { "none".to_owned() } else { default };
        format!("\n  {name} (default: {default})\n      {}", help_of(name))
    };
    let settings: String = settings::all().iter().map(about).collect();
    format!(
        "Settings, each also by the variable `FOREBAY_<NAME>`:\n{settings}\n\n\
         Warnings and notes go to standard error.\n\n\
         Example: FOREBAY_SEQ_LEN=4096 forebay config --set batch_size=8"
    )
}

fn write_table(resolved: &Resolved, context: &mut Context<'_>) -> Result<(), Failure> {
    let mut rows = vec![["setting", "value", "origin"].map(str::to_owned)];
    for origin in &resolved.origins {
        let value = readable(&origin.value, origin.name);
        rows.push([origin.name, &value, &origin.origin].map(|cell| escaped(cell).into_owned()));
    }
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.filter(|width| *width <= WIDEST).max().unwrap_or(0)
    };
    let (names, values) = (width(0), width(1));
    for [name, value, origin] in &rows {
        writeln!(context.out, "{name:names$}  {value:values$}  {origin}")?;
    }
    Ok(())
}

/// The text of a value. A number of bytes gets a unit.
fn readable(text: &str, name: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let setting = settings::find(name);
    match setting.filter(|setting| accepts(setting, "1GiB")).and_then(|setting| number(setting, text)) {
        Some(number) => exact_bytes(number),
        None => text.to_owned(),
    }
}

fn as_json(resolved: &Resolved) -> Value {
    let settings: Map<String, Value> = resolved
        .origins
        .iter()
        .map(|origin| {
            let setting = settings::find(origin.name);
            let value = setting.and_then(|setting| setting.value(&resolved.config).to_json());
            (origin.name.to_owned(), json!({"value": value, "origin": origin.origin}))
        })
        .collect();
    json!({"settings": settings, "warnings": resolved.warnings, "notes": resolved.notes})
}

/// The number that `text` means to a setting. `None` for a name or a list of numbers, even if it
/// looks like a number.
fn number(setting: &Setting, text: &str) -> Option<u64> {
    let number = settings::size(text, true)?;
    let is_number = means(setting, text, &format!("0{number}")) && !accepts(setting, "1-2");
    is_number.then_some(number)
}

/// Whether two texts are the same value of a setting.
fn means(setting: &Setting, text: &str, other: &str) -> bool {
    let [mut one, mut two] = [Config::default(), Config::default()];
    setting.set(&mut one, text).is_ok() && setting.set(&mut two, other).is_ok() && one == two
}

fn accepts(setting: &Setting, text: &str) -> bool {
    setting.set(&mut Config::default(), text).is_ok()
        // A setting that accepts any name takes no number.
        && setting.set(&mut Config::default(), "no number").is_err()
}
