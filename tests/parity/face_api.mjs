// Print what face-api's networks give for pictures as JSON: network -> {features, outputs}, a list of numbers for each picture.
//
// node face_api.mjs PACKAGE PICTURES: the unpacked npm package, and a file of uint8 RGB [n, 112, 112, 3].
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';

globalThis.window = globalThis; // the build with TensorFlow.js inside is for browsers
globalThis.document = { createElement: () => ({ getContext: () => null }) };
const folder = resolve(process.argv[2]);
const { tf, nets, NetInput } = await import(`${folder}/dist/face-api.esm.js`);
await tf.setBackend('cpu');

const bytes = readFileSync(process.argv[3]);
const pictures = tf.tensor4d(new Float32Array(bytes), [bytes.length / (112 * 112 * 3), 112, 112, 3]);
const input = () => new NetInput(tf.unstack(pictures), true);
const found = {};
for (const [name, net, file] of [
  ['face_expression', nets.faceExpressionNet, 'face_expression_model'],
  ['face_landmarks', nets.faceLandmark68Net, 'face_landmark_68_model'],
]) {
  const [{ weights }] = JSON.parse(readFileSync(`${folder}/model/${file}-weights_manifest.json`));
  const content = readFileSync(`${folder}/model/${file}.bin`);
  net.loadFromWeightMap(tf.io.decodeWeights(new Uint8Array(content).buffer, weights));
  const features = net.faceFeatureExtractor.forwardInput(input());
  found[name] = { features: features.reshape([-1, 256]).arraySync(), outputs: net.runNet(input()).arraySync() };
}
console.log(JSON.stringify(found));
