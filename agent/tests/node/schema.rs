//! Compares what ebb prints with docs/ebb.dev-v1.schema.json.

use std::any::type_name;

use anyhow::{Context as _, Result, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const SCHEMA: &str = include_str!("../../../docs/ebb.dev-v1.schema.json");

/// Reads a document of the type `T`. Requires that it is one by the schema, too.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    check::<T>(text)?;
    serde_json::from_str(text).with_context(|| text.to_owned())
}

/// Requires that `text` is a document of the type `T`, with no field that the schema does not have.
fn check<T>(text: &str) -> Result<()> {
    let path = type_name::<T>();
    let name = path.rsplit("::").next().unwrap_or(path);
    let mut schema: Value = serde_json::from_str(SCHEMA)?;
    ensure!(schema["$defs"][name].is_object(), "no schema of {name}");
    let definitions = schema["$defs"].as_object_mut().context("no definitions")?;
    definitions.values_mut().for_each(forbid_other_fields);
    let schema = json!({"$ref": format!("#/$defs/{name}"), "$defs": schema["$defs"]});
    let validator = jsonschema::validator_for(&schema)?;
    let document = serde_json::from_str(text).with_context(|| text.to_owned())?;
    let errors = validator.iter_errors(&document);
    let errors: Vec<_> = errors
        .map(|e| format!("{}: {e}", e.instance_path()))
        .collect();
    ensure!(errors.is_empty(), "not a {name}: {errors:?}\n{text}");
    Ok(())
}

/// The published schema allows fields of later versions.
fn forbid_other_fields(schema: &mut Value) {
    if let Some(object) = schema.as_object_mut() {
        let has_list = object.contains_key("properties");
        if has_list && !object.contains_key("additionalProperties") {
            object.insert("additionalProperties".into(), false.into());
        }
        object.values_mut().for_each(forbid_other_fields);
    } else if let Some(list) = schema.as_array_mut() {
        list.iter_mut().for_each(forbid_other_fields);
    }
}
