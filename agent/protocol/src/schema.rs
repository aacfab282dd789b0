//! The JSON schema of the documents of `ebb.dev/v1`, made from their types. docs/ebb.dev-v1.schema.json has it.

use schemars::{
    JsonSchema,
    generate::{SchemaGenerator, SchemaSettings},
};
use serde_json::{Value, json};

use crate::views::{
    AdviceList, Diagnosis, DrainList, DryRun, Explanation, FlowList, NodeDocuments, PodList,
    Problem, Released, VersionView, Versions, WaitReply,
};

/// The schema: any of the documents. Each has its own under `$defs`, by the name of its type.
pub fn document() -> Value {
    let mut types = SchemaSettings::draft2020_12()
        .for_serialize()
        .into_generator();
    let documents = [
        of::<AdviceList>,
        of::<Diagnosis>,
        of::<DrainList>,
        of::<DryRun>,
        of::<Explanation>,
        of::<FlowList>,
        of::<NodeDocuments<AdviceList>>,
        of::<NodeDocuments<Diagnosis>>,
        of::<NodeDocuments<Versions>>,
        of::<PodList>,
        of::<Problem>,
        of::<Released>,
        of::<VersionView>,
        of::<Versions>,
        of::<WaitReply>,
    ];
    let any: Vec<_> = documents.iter().map(|of| of(&mut types)).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ebb.dev/v1",
        "description": "The JSON that ebb prints with -o json and the agent serves. A document may gain fields.",
        "anyOf": any,
        "$defs": types.take_definitions(true),
    })
}

fn of<T: JsonSchema>(types: &mut SchemaGenerator) -> Value {
    types.subschema_for::<T>().to_value()
}
