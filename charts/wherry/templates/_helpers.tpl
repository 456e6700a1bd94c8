{{- define "wherry.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "wherry.operator" -}}
{{ include "wherry.fullname" . }}-operator
{{- end -}}

{{/* Names of objects that belong to no namespace tell releases apart by theirs. */}}
{{- define "wherry.clusterName" -}}
wherry:{{ .Release.Namespace }}:{{ include "wherry.fullname" . }}
{{- end -}}

{{- define "wherry.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "wherry.operator" .) }}
{{- else -}}
{{ required "serviceAccount.name must name an existing service account when serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "wherry.selector" -}}
app.kubernetes.io/name: wherry-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "wherry.labels" -}}
{{ include "wherry.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: wherry
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* image (list $ "runtime") */}}
{{- define "wherry.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- with $root.Values.images.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/*
What the operator may do where it serves LLMDeployments. It reads, creates and deletes, but never changes, Secrets; of pods it
changes the mark that drains them and the condition of their readiness gate. pods get, list and watch are also what it hands
on to a router.
*/}}
{{- define "wherry.rules" -}}
- apiGroups: [inference.wherry.dev]
  resources: [llmdeployments]
  verbs: [get, list, watch, patch]
- apiGroups: [inference.wherry.dev]
  resources: [llmdeployments/status]
  verbs: [get, patch]
- apiGroups: [inference.wherry.dev]
  resources: [llmdeployments/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, create, patch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [get, create, patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [list, create, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, create, patch, delete]
{{- end -}}
