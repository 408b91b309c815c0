//! `forebay config`: the settings in force, and where each came from.

use forebay::settings::{self, Scope};

use crate::{Context, Failure, Sets};

/// Columns are no wider than this; longer values push the rest of their line to the right.
const WIDEST: usize = 32;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let resolved = settings::resolve(&options.sets.sets, context.env, Scope::All)?;
    let mut rows = vec![("setting", "value", "origin")];
    for origin in &resolved.origins {
        let value = if origin.value.is_empty() { "-" } else { origin.value.as_str() };
        rows.push((origin.name, value, &origin.origin));
    }
    let width = |of: fn(&(&str, &str, &str)) -> usize| rows.iter().map(of).filter(|w| *w <= WIDEST).max().unwrap_or(0);
    let (names, values) = (width(|row| row.0.chars().count()), width(|row| row.1.chars().count()));
    for (name, value, origin) in &rows {
        writeln!(context.out, "{name:names$}  {value:values$}  {origin}")?;
    }
    for warning in &resolved.warnings {
        writeln!(context.out, "warning: {warning}")?;
    }
    for note in &resolved.notes {
        writeln!(context.out, "note: {note}")?;
    }
    Ok(0)
}
