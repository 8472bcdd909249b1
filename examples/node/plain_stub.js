// Calls Rillgate from Node with a plain stub: @grpc/grpc-js and @grpc/proto-loader, no code generated.
//
//     node examples/node/plain_stub.js "What is 4821 + 1397?" [HOST:PORT]

const path = require('node:path')
const grpc = require('@grpc/grpc-js')
const protoLoader = require('@grpc/proto-loader')

const PROTOS = path.join(__dirname, '..', '..', 'protos')

const definition = protoLoader.loadSync('rillgate_proto/v1/inference.proto', {
  includeDirs: [PROTOS],
  keepCase: true, // field names as in the .proto file
  longs: String, // 64-bit numbers do not fit into a JavaScript number
  enums: String,
  defaults: true,
})
const { Inference } = grpc.loadPackageDefinition(definition).rillgate.v1

function main(question, target = '127.0.0.1:50051') {
  const client = new Inference(target, grpc.credentials.createInsecure())
  const request = {
    chat: { messages: [{ role: 'user', content: question }] },
    stopping: { max_tokens: 512 },
  }
  const stream = client.Generate(request, { deadline: Date.now() + 60_000 })
  let separator = '' // between reasoning and answer
  stream.on('data', (response) => {
    for (const output of response.outputs) {
      if (output.reasoning_text) {
        process.stdout.write(output.reasoning_text)
        separator = '\n\n'
      }
      if (output.text) {
        process.stdout.write(separator + output.text)
        separator = ''
      }
    }
    for (const finished of response.finished) {
      process.stdout.write(`\n[${finished.reason}, ${finished.usage.completion_tokens} tokens]\n`)
    }
  })
  stream.on('error', (error) => {
    console.error(`${grpc.status[error.code]}: ${error.details}`)
    process.exitCode = 1
    client.close()
  })
  stream.on('end', () => client.close())
}

main(...process.argv.slice(2))
